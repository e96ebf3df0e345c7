// What torch's C++ asks a GPU's runtime for, where there is none: one device, streams that are numbers, and events that
// have always happened. Autograd then runs the backward of fake CUDA tensors on a thread of the device, as on a GPU.
// Must be loaded before torch looks for CUDA, once, when it is imported.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <map>
#include <mutex>

namespace {

// Pinned memory: the CPU's, whose blocks are remembered, so that a tensor can be asked whether it is pinned.
struct Pinned final : c10::Allocator {
  static inline std::mutex mutex;
  static inline std::map<const char*, size_t> blocks; // by first byte

  c10::DataPtr allocate(size_t count) override {
    char* first = new char[count + 1];
    std::lock_guard<std::mutex> lock(mutex);
    blocks[first] = count;
    return {first, first, &release, c10::Device(c10::DeviceType::CPU)};
  }
  static void release(void* first) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      blocks.erase(static_cast<char*>(first));
    }
    delete[] static_cast<char*>(first);
  }
  static bool has(const void* pointer) {
    std::lock_guard<std::mutex> lock(mutex);
    auto next = blocks.upper_bound(static_cast<const char*>(pointer));
    if (next == blocks.begin())
      return false;
    auto [first, count] = *std::prev(next);
    return pointer <= first + count;
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* target, const void* source, size_t count) const override {
    default_copy_data(target, source, count);
  }
};

Pinned pinned;

} // namespace

namespace at {

struct CUDAHooks : CUDAHooksInterface { // torch finds the class by this name
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  bool isPinnedPtr(const void* pointer) const override { return Pinned::has(pointer); }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned; }
};

REGISTER_CUDA_HOOKS(CUDAHooks)

} // namespace at

namespace {

using namespace c10;

thread_local StreamId current = 0;
std::atomic<StreamId> newest{0};

struct Guard final : impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Device getDevice() const override { return Device(type(), 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return Stream(Stream::UNSAFE, getDevice(), current); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::UNSAFE, getDevice(), 0); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::UNSAFE, getDevice(), ++newest); }
  Stream exchangeStream(Stream stream) const noexcept override {
    Stream before = getStream(getDevice());
    current = stream.id();
    return before;
  }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const Stream&, const DeviceIndex, const EventFlag) const override {
    static int happened;
    *event = &happened;
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};

Guard guard;
impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, &guard);

} // namespace

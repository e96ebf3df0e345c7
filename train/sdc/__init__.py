"""Silent data corruption in a training step: settings, state at rest, verdicts."""

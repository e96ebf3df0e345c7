"""Silent data corruption: what is compared, who is named, and faults injected to try it."""

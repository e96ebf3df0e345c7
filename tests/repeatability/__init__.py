"""Whether the same inputs give the same bits: operators, collectives and whole runs, each with planted faults."""

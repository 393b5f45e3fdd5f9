"""From the static facts of a call to a launchable kernel: problem -> config -> source -> cubin -> launch plan."""

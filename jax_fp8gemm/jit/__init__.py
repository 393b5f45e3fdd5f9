"""From a call's static facts to a launchable kernel: problem -> config -> source -> cubin -> launch plan."""

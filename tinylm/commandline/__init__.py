"""What all commands share: settings, exit status, and the terminal."""

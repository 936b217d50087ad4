"""What every command shares: settings, exit status, and the terminal."""

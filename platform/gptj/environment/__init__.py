"""What this machine and this installation offer: devices and optional packages."""

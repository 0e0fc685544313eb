"""The servers Doorstep is measured against, and how each is installed and started."""

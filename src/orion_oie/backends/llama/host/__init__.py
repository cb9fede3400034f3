"""The application's side: finds files, estimates memory, starts workers, exchanges messages."""

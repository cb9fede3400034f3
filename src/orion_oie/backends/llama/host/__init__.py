"""The application's side: finds files, estimates memory, starts workers and talks to them."""

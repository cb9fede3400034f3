"""What can be read in a prompt: its parts, language, words and shapes. No model, no numpy."""

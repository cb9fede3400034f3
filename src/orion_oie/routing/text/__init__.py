"""What can be read in a prompt: its parts, language, words, shapes and features. No model, no numpy."""

"""Feature extraction from a prompt: its parts, language, words and shapes. No model is involved."""

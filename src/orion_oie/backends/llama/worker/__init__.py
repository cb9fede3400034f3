"""The process that holds one loaded variant: reads commands, batches requests, calls llama.cpp."""

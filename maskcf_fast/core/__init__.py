"""What every room stands on: checks, errors, precision, files and processes. It knows nothing of models or images."""

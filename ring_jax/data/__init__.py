"""The bundled model and the pass-key texts that it was trained on."""

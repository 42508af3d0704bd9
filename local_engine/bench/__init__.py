"""`hybridgate-engine bench`: this engine beside other servers, on the same model, in one run."""

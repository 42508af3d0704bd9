"""The engine that serves one local model over the OpenAI wire: own scheduler, paged KV cache, transformers forward."""

"""The bundled demo model: a Llama of about two million parameters, its tokenizer, and the scripts that made them.

Owns the model's files and how they are reproduced. Refuses to be imported by a server: engines read the files.
"""

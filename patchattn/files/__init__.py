"""Files and folders: documents, tensors, and what is not trusted."""

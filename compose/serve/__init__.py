"""`gateskip serve`: an HTTP server for a model folder, with the requests and answers of OpenAI."""

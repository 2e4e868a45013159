"""The form of OpenAI's API: fields of requests, answers, errors."""

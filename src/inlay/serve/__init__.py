"""Serving a base and its adapters over HTTP: continuous batching, adapters that come and go, OpenAI's protocol."""

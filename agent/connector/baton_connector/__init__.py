"""Baton's KV connector for vLLM. vLLM loads `baton_connector.connector.BatonConnector`."""

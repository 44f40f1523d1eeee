"""Chats, tokenisation, records on disk and batches."""

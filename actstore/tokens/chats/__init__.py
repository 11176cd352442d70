"""Chats: lists of messages, written out as text by a chat template, with the role and the message of each token."""

"""Requests of many callers in, one model's steps over all of them: ids in, ids out."""

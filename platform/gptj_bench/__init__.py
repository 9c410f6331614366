"""What `platform/gptj_bench` measures, one file a subject."""

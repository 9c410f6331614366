"""`python -m gptj_cli` is `gptj`."""

from gptj_cli.app import main

if __name__ == "__main__":
    main()

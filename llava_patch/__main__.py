"""`python -m llava_patch`: the console command, where its script is not on the path."""

from llava_patch.cli.main import main

if __name__ == "__main__":
    main()

"""The console command `llava-patch`: one file a subcommand."""

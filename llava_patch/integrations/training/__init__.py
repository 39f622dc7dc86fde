"""What LLaVA's and Hugging Face's trainers get of a patch."""

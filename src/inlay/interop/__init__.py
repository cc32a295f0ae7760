"""Reading and writing the files of other libraries: HF PEFT, vLLM, LLM-Adapters, AdapterHub."""

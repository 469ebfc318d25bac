"""ftgen: specs of Llama fine-tuning benchmarks in, sbatch scripts and result tables out."""

__version__ = "0.1.0"

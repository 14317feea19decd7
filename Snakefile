# The workflow is workflow/Snakefile, where Snakemake's catalogue and a wheel look for it.
include: "workflow/Snakefile"


# What a bare `snakemake` makes: the first rule of an included file is not it.
rule all:
    input:
        rules.demo.input,

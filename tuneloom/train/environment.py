"""The environment of a process that trains. The C library reads it when the process starts."""

WORKER_ENVIRONMENT = {
    # OpenMP's threads spin while they wait for each other: by default for so long that work beside them on the same
    # cores makes a step ten times slower, and without any spin they sleep too often. Steps of SmolLM2-135M with two
    # threads on two cores, tokens a second on a free machine and beside one busy process: 407 and 56 with 20000,
    # 306 and 160 with 2000, 298 and 219 with 500; 239 on a free machine without spin.
    "GOMP_SPINCOUNT": "1000",
    # Nothing of ours is compiled, and bitsandbytes, which PEFT imports, has kernels of its own for CPU and CUDA; that
    # it wraps others for torch's compiler loads all of that: 4 of the 12 seconds in which a worker's imports compute.
    "TORCHDYNAMO_DISABLE": "1",
    # Nothing is fetched while a job trains, and nobody is told of it.
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

"""What the environment of a process with an engine must hold before it starts. Strings only; nothing is set here."""

# Threads that spin while they wait take the machine from everything else on it, and from each other. On 2 cores with
# busy neighbours, a 135M base in bf16 and 32 answers at once: 2 threads that wait passively 80-120 tokens/s, one thread
# 50-120, 2 that spin under 25, with GOMP_SPINCOUNT=20000 too.
# The second says the same once more, since processes that train have another value, and it goes before the policy.
_WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}

# Weights in large pages: a step reads all of them, and with pages of 4 KiB it spends a part of its time on finding
# them. The same base, 32 rows, one thread: 57 ms of oneDNN's products a step become 50. Other C libraries ignore it.
_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

ENGINE_ENVIRONMENT = {**_WAITING, **_PAGES, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

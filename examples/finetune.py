import json
import time

from openai import OpenAI

client = OpenAI()  # reads OPENAI_BASE_URL and OPENAI_API_KEY
rows = [{"instruction": f"Is {n} even?", "output": "no" if n % 2 else "yes"} for n in range(100)]
data = "\n".join(json.dumps(row) for row in rows).encode()
file = client.files.create(file=("rows.jsonl", data), purpose="fine-tune")
base = "HuggingFaceTB/SmolLM2-135M-Instruct"
job = client.fine_tuning.jobs.create(model=base, training_file=file.id, suffix="parity")
while job.status not in ("succeeded", "failed", "cancelled"):
    time.sleep(2)
    job = client.fine_tuning.jobs.retrieve(job.id)
print(job.status, job.fine_tuned_model or job.error.message)
question = [{"role": "user", "content": "Is 42 even?"}]
for model in (base, "parity"):
    answer = client.chat.completions.create(model=model, messages=question, max_tokens=20, temperature=0)
    print(f"{model}: {answer.choices[0].message.content}")

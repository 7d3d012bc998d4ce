import json
import time

from openai import OpenAI

client = OpenAI()  # finds the server by OPENAI_BASE_URL and OPENAI_API_KEY: eval "$(tuneloom env)"
base = "HuggingFaceTB/SmolLM2-135M-Instruct"
questions = {f"Is {number} even?": "no" if number % 2 else "yes" for number in range(100)}
rows = [
    {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    for question, answer in questions.items()
]
data = "\n".join(json.dumps(row) for row in rows).encode()
file = client.files.create(file=("rows.jsonl", data), purpose="fine-tune")
job = client.fine_tuning.jobs.create(model=base, training_file=file.id, suffix="parity")
while (job := client.fine_tuning.jobs.retrieve(job.id)).status not in ("succeeded", "failed", "cancelled"):
    time.sleep(2)
print(job.status, job.fine_tuned_model)
for model in (base, "parity"):  # "parity" is the active version of the model, "parity@v1" this one for ever
    question = [{"role": "user", "content": "Is 42 even?"}]
    answer = client.chat.completions.create(model=model, messages=question, max_tokens=20, temperature=0)
    print(f"{model}: {answer.choices[0].message.content}")

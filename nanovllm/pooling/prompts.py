"""How a language model is asked whether a document answers a query: as Qwen3-Reranker is trained.

The text is that of the model's card (Zhang et al., Qwen3 Embedding, 2025). Its next token is "yes"
or "no", and how likely the one is against the other is the score.
"""

ANSWERS = ("yes", "no")  # what the next token may be, the one that counts first
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")  # special tokens that TEMPLATE takes
TEMPLATE = (
    "<|im_start|>system\n"
    "Judge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n"
    "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)

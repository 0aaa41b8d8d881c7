"""LoLCATs: softmax attention becomes a window of it and linear attention behind."""

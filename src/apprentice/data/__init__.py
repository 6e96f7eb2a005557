"""From traces to rows for fine-tuning: filters, judge, imported chats, chat rows, the order of training."""

package engine

import "conex/internal/container"

func (e *Engine) event(rec *container.Record, action string, attrs map[string]string) {}

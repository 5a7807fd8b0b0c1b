package engine

import (
	"context"
	"strings"
)

// Rename gives a container another name.
func (e *Engine) Rename(ctx context.Context, name, newName string) error {
	if name == "" || newName == "" {
		return invalid("neither old nor new names may be empty")
	}
	newName = strings.TrimPrefix(newName, "/")
	n, err := e.snapshot(ctx, name)
	if err != nil {
		return err
	}
	if err := e.Containers().Rename(n.Record.ID, newName); err != nil {
		return classify(err)
	}
	if err := e.Networks().Rename(ctx, n.Record.ID, newName); err != nil {
		return err
	}
	e.event(n.Record, "rename", map[string]string{"oldName": "/" + n.Record.Name, "name": newName})
	return nil
}

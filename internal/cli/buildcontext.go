package cli

import (
	"fmt"
	"strings"
)

// contextsFlag is --build-context name=value, several times; of a name the last counts.
type contextsFlag struct{ m *map[string]string }

func (f contextsFlag) Set(s string) error {
	name, value, ok := strings.Cut(s, "=")
	if !ok || name == "" || value == "" {
		return fmt.Errorf("invalid context value: %s, expected key=value", s)
	}
	if *f.m == nil {
		*f.m = map[string]string{}
	}
	(*f.m)[name] = value
	return nil
}

func (contextsFlag) Type() string   { return "stringArray" }
func (contextsFlag) String() string { return "" }

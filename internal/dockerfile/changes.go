package dockerfile

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"

	"conex/internal/ocispec"
	"conex/internal/ondemand"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/linter"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/frontend/dockerfile/shell"
)

// ApplyChanges applies Dockerfile instructions to a config, as `import --change` and `commit --change` have them: CMD, ENTRYPOINT, ENV,
// EXPOSE, HEALTHCHECK, LABEL, ONBUILD, STOPSIGNAL, USER, VOLUME and WORKDIR. c is changed only when all of them are valid, and its lists
// and maps are replaced, never written to.
func ApplyChanges(c *ocispec.ImageConfig, changes []string) error {
	ondemand.Dockerfile()
	if len(changes) == 0 {
		return nil
	}
	next := *c
	res, err := parser.Parse(strings.NewReader(strings.Join(changes, "\n")))
	if err != nil {
		return fmt.Errorf("change: %w", err)
	}
	ch := changer{c: &next, lex: shell.NewLex(res.EscapeToken)}
	for _, node := range res.AST.Children {
		cmd, err := instructions.ParseInstructionWithLinter(node, linter.New(&linter.Config{}))
		if err == nil {
			err = ch.apply(cmd)
		}
		if err != nil {
			return fmt.Errorf("change %q: %w", node.Original, err)
		}
	}
	*c = next
	return nil
}

// changer applies one list of changes.
type changer struct {
	c      *ocispec.ImageConfig
	lex    *shell.Lex
	cmdSet bool
}

func (ch *changer) apply(cmd any) error {
	c := ch.c
	switch v := cmd.(type) {
	case *instructions.CmdCommand:
		c.Cmd, ch.cmdSet = ch.command(v.ShellDependantCmdLine), true
	case *instructions.EntrypointCommand:
		c.Entrypoint = ch.command(v.ShellDependantCmdLine)
		if !ch.cmdSet {
			c.Cmd = nil // what was there before belonged to the old entrypoint
		}
	case *instructions.EnvCommand:
		if err := v.Expand(ch.word); err != nil {
			return err
		}
		env := slices.Clone(c.Env)
		for _, kv := range v.Env {
			env = setEnv(env, kv.Key, kv.Value)
		}
		c.Env = env
	case *instructions.LabelCommand:
		if err := v.Expand(ch.word); err != nil {
			return err
		}
		c.Labels = cloned(c.Labels)
		for _, kv := range v.Labels {
			c.Labels[kv.Key] = kv.Value
		}
	case *instructions.ExposeCommand:
		return ch.expose(v.Ports)
	case *instructions.HealthCheckCommand:
		c.Healthcheck = v.Health
	case *instructions.OnbuildCommand:
		c.OnBuild = append(slices.Clone(c.OnBuild), v.Expression)
	case *instructions.StopSignalCommand:
		if err := v.Expand(ch.word); err != nil {
			return err
		}
		c.StopSignal = v.Signal
	case *instructions.UserCommand:
		if err := v.Expand(ch.word); err != nil {
			return err
		}
		c.User = v.User
	case *instructions.VolumeCommand:
		if err := v.Expand(ch.word); err != nil {
			return err
		}
		c.Volumes = cloned(c.Volumes)
		for _, p := range v.Volumes {
			if p == "" {
				return fmt.Errorf("VOLUME specified can not be an empty string")
			}
			c.Volumes[p] = struct{}{}
		}
	case *instructions.WorkdirCommand:
		if err := v.Expand(ch.word); err != nil {
			return err
		}
		dir := v.Path
		if !path.IsAbs(dir) {
			dir = path.Join("/", c.WorkingDir, dir)
		}
		c.WorkingDir = path.Clean(dir)
	default:
		name := "this instruction"
		if n, ok := cmd.(interface{ Name() string }); ok {
			name = strings.ToUpper(n.Name())
		}
		return fmt.Errorf("%s is not a valid change command", name)
	}
	return nil
}

// word expands variables from the environment so far and takes quotes off.
func (ch *changer) word(s string) (string, error) {
	out, _, err := ch.lex.ProcessWord(s, shell.EnvsFromSlice(ch.c.Env))
	return out, err
}

func (ch *changer) command(l instructions.ShellDependantCmdLine) []string {
	if !l.PrependShell {
		return l.CmdLine
	}
	sh := ch.c.Shell
	if len(sh) == 0 {
		sh = []string{"/bin/sh", "-c"}
	}
	return append(slices.Clone(sh), strings.Join(l.CmdLine, " "))
}

// expose adds ports, each number[-number][/protocol].
func (ch *changer) expose(ports []string) error {
	set := cloned(ch.c.ExposedPorts)
	for _, p := range ports {
		words, err := ch.lex.ProcessWords(p, shell.EnvsFromSlice(ch.c.Env))
		if err != nil {
			return err
		}
		for _, w := range words {
			p, err := parsePort(w)
			if err != nil {
				return err
			}
			for n := p.first; n <= p.last; n++ {
				set[strconv.Itoa(n)+"/"+p.proto] = struct{}{}
			}
		}
	}
	ch.c.ExposedPorts = set
	return nil
}

// setEnv replaces key's entry or appends one.
func setEnv(env []string, key, value string) []string {
	for i, e := range env {
		if k, _, _ := strings.Cut(e, "="); k == key {
			env[i] = key + "=" + value
			return env
		}
	}
	return append(env, key+"="+value)
}

func cloned[V any](m map[string]V) map[string]V {
	if m == nil {
		return map[string]V{}
	}
	return maps.Clone(m)
}

package build

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"conex/internal/dockerfile"
	"conex/internal/image"
	"conex/internal/ocispec"

	"golang.org/x/sys/unix"
)

// defaultPath is $PATH in an image that starts from scratch, and of steps in one that sets none.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// history is a history entry that waits for the node behind it, if there is one, to say when it was made.
type history struct {
	entry ocispec.History
	node  *node
	// inherited entries are the base image's.
	inherited bool
}

// stageConfig is what instructions that change no file fold into.
type stageConfig struct {
	image   ocispec.Image
	history []history
	cmdSet  bool // CMD came in this stage, so ENTRYPOINT leaves it
	size    int  // bytes of the history's words, which repeat what the config has
}

// maxConfig bounds what instructions put into a config: more could not be pulled.
const maxConfig = image.MaxConfig

var errConfigSize = fmt.Errorf("the image's config would have more than %d bytes", maxConfig)

func (c *stageConfig) clone() stageConfig {
	out := *c
	cfg := &out.image.Config
	cfg.Env, cfg.Cmd, cfg.Entrypoint = slices.Clone(cfg.Env), slices.Clone(cfg.Cmd), slices.Clone(cfg.Entrypoint)
	cfg.OnBuild, cfg.Shell = slices.Clone(cfg.OnBuild), slices.Clone(cfg.Shell)
	cfg.ExposedPorts, cfg.Volumes, cfg.Labels = maps.Clone(cfg.ExposedPorts), maps.Clone(cfg.Volumes), maps.Clone(cfg.Labels)
	if cfg.Healthcheck != nil {
		h := *cfg.Healthcheck
		h.Test = slices.Clone(h.Test)
		cfg.Healthcheck = &h
	}
	out.history = slices.Clone(c.history)
	out.cmdSet = false
	return out
}

// note adds a history entry without a layer.
func (c *stageConfig) note(createdBy string) { c.noteNode(createdBy, nil) }

// noteNode adds a history entry for what n makes.
func (c *stageConfig) noteNode(createdBy string, n *node) {
	c.size += len(createdBy)
	c.history = append(c.history, history{entry: ocispec.History{CreatedBy: createdBy, EmptyLayer: true}, node: n})
}

func (c *stageConfig) setEnv(key, value string) {
	env := c.image.Config.Env
	for i, e := range env {
		if k, _, _ := strings.Cut(e, "="); k == key {
			env[i] = key + "=" + value
			return
		}
	}
	c.image.Config.Env = append(env, key+"="+value)
}

// withShell gives a command line its shell.
func (c *stageConfig) withShell(l dockerfile.CommandLine) []string {
	if !l.Shell {
		return l.Args
	}
	sh := c.image.Config.Shell
	if len(sh) == 0 {
		sh = []string{"/bin/sh", "-c"}
	}
	return append(slices.Clone(sh), strings.Join(l.Args, " "))
}

// workdir is the working folder, absolute.
func (c *stageConfig) workdir() string { return path.Join("/", c.image.Config.WorkingDir) }

// fold applies an instruction that changes no file; handled is false for the others. The history's wording is BuildKit's.
func (c *stageConfig) fold(in dockerfile.Instruction) (handled bool, err error) {
	cfg := &c.image.Config
	switch i := in.(type) {
	case *dockerfile.EnvVars:
		msg := "ENV"
		for _, p := range i.Vars {
			if p.Key == "" {
				return true, fmt.Errorf("ENV with an empty name")
			}
			c.setEnv(p.Key, p.Value)
			msg += " " + p.String()
		}
		c.note(msg)
	case *dockerfile.Label:
		msg := "LABEL"
		if cfg.Labels == nil {
			cfg.Labels = map[string]string{}
		}
		for _, p := range i.Labels {
			cfg.Labels[p.Key] = p.Value
			msg += " " + p.String()
		}
		c.note(msg)
	case *dockerfile.Maintainer:
		c.image.Author = i.Name
		c.note("MAINTAINER " + i.Name)
	case *dockerfile.User:
		cfg.User = i.User
		c.note("USER " + i.User)
	case *dockerfile.Expose:
		if cfg.ExposedPorts == nil {
			cfg.ExposedPorts = map[string]struct{}{}
		}
		for _, p := range i.Ports {
			cfg.ExposedPorts[p] = struct{}{}
		}
		c.note("EXPOSE " + fmt.Sprint(i.Ports))
	case *dockerfile.Volume:
		if cfg.Volumes == nil {
			cfg.Volumes = map[string]struct{}{}
		}
		for _, p := range i.Paths {
			if p == "" {
				return true, fmt.Errorf("VOLUME specified can not be an empty string")
			}
			cfg.Volumes[p] = struct{}{}
		}
		c.note("VOLUME " + fmt.Sprint(i.Paths))
	case *dockerfile.StopSignal:
		if !validSignal(i.Signal) {
			return true, fmt.Errorf("invalid signal: %s", i.Signal)
		}
		cfg.StopSignal = i.Signal
		c.note("STOPSIGNAL " + i.Signal)
	case *dockerfile.Shell:
		cfg.Shell = i.Shell
		c.note("SHELL " + fmt.Sprint(i.Shell))
	case *dockerfile.Cmd:
		cfg.Cmd, c.cmdSet = c.withShell(i.CommandLine), true
		c.note(fmt.Sprintf("CMD %q", cfg.Cmd))
	case *dockerfile.Entrypoint:
		cfg.Entrypoint = c.withShell(i.CommandLine)
		if !c.cmdSet {
			cfg.Cmd = nil // the base's command was meant for the base's entry point
		}
		c.note(fmt.Sprintf("ENTRYPOINT %q", cfg.Entrypoint))
	case *dockerfile.Healthcheck:
		h := i.Check
		cfg.Healthcheck = &h
		c.note(fmt.Sprintf("HEALTHCHECK %+v", h))
	case *dockerfile.OnBuild:
		cfg.OnBuild = append(cfg.OnBuild, i.Expr)
	default:
		return false, nil
	}
	if c.size > maxConfig {
		return true, errConfigSize
	}
	return true, nil
}

func validSignal(s string) bool {
	if n, err := strconv.Atoi(s); err == nil {
		return n >= 1 && n <= 64
	}
	name := strings.ToUpper(s)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if base, num, ok := strings.Cut(name, "+"); ok && base == "SIGRTMIN" {
		n, err := strconv.Atoi(num)
		return err == nil && n >= 0 && n <= 30
	}
	if base, num, ok := strings.Cut(name, "-"); ok && base == "SIGRTMAX" {
		n, err := strconv.Atoi(num)
		return err == nil && n >= 0 && n <= 30
	}
	return name == "SIGRTMIN" || name == "SIGRTMAX" || unix.SignalNum(name) != 0
}

// begins is the time of the base image, else of the first step.
func (c *stageConfig) begins() time.Time {
	if c.image.Created != nil {
		return *c.image.Created
	}
	for _, h := range c.history {
		if h.node != nil && h.node.res.created.Unix() > 0 {
			return h.node.res.created.UTC()
		}
	}
	return time.Unix(0, 0).UTC()
}

// assemble makes the image's config of a stage whose nodes are solved. Its time is that of its last step, and steps are never older
// than what they stand on; epoch, if given, is the time of everything that this build added.
func (c *stageConfig) assemble(res result, epoch *time.Time) ocispec.Image {
	img := c.image
	img.RootFS = ocispec.RootFS{Type: "layers", DiffIDs: res.layers}
	if img.RootFS.DiffIDs == nil {
		img.RootFS.DiffIDs = []ocispec.Digest{}
	}
	img.History = nil
	last := c.begins()
	for _, h := range c.history {
		e := h.entry
		if h.node != nil {
			e.EmptyLayer = !h.node.res.added
			if when := h.node.res.created; when.After(last) {
				last = when.UTC()
			}
		}
		if !h.inherited {
			when := last
			if epoch != nil {
				when = *epoch
			}
			e.Created = &when
		}
		img.History = append(img.History, e)
	}
	if epoch != nil {
		last = *epoch
	}
	img.Created = &last
	return img
}

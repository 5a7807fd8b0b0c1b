package dockerfile

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"conex/internal/ocispec"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
)

// Instruction is one of this package's instruction types, by pointer: *Run, *Copy, *Env and so on.
type Instruction interface {
	// expand returns the instruction with its variables replaced; itself when it has none.
	expand(f *File, env Env) (Instruction, error)
}

// Expand returns the step's instruction with variables replaced by the values in env, where the Dockerfile's rules allow them.
// The step stays as it is. The error has the step's place.
func (f *File) Expand(s Step, env Env) (Instruction, error) {
	in, err := s.Instruction.expand(f, env)
	if err != nil {
		return nil, f.Errorf(s.Lines, "%w", err)
	}
	return in, nil
}

// Pair is a name and its value.
type Pair struct {
	Key, Value string
	// Blank says that a blank stands between them where "=" should.
	Blank bool
}

func (p Pair) String() string { return p.Key + "=" + p.Value }

type (
	// EnvVars sets environment variables.
	EnvVars struct{ Vars []Pair }
	// Label sets labels.
	Label struct{ Labels []Pair }
	// Arg declares build arguments; Value is nil without a default.
	Arg struct{ Args []ArgVar }
	// ArgVar is one declared argument.
	ArgVar struct {
		Key   string
		Value *string
		// Description is what the comment above says of it: "# NAME description".
		Description string
	}
	// Maintainer names the author.
	Maintainer struct{ Name string }
	// Workdir sets the working folder.
	Workdir struct{ Path string }
	// User sets the user of later steps and of containers.
	User struct{ User string }
	// Expose declares ports.
	Expose struct {
		// Ports are as written, "80" or "8000-8010/udp"; after Expand one by one, "80/tcp".
		Ports []string
		// Words are the written ports after Expand.
		Words []string
	}
	// Volume declares volumes.
	Volume struct{ Paths []string }
	// StopSignal sets the signal of stop.
	StopSignal struct{ Signal string }
	// Shell sets the shell of shell forms.
	Shell struct{ Shell []string }
	// Cmd sets the default command.
	Cmd struct{ CommandLine }
	// Entrypoint sets the entry point.
	Entrypoint struct{ CommandLine }
	// Healthcheck sets the health check.
	Healthcheck struct{ Check ocispec.Healthcheck }
	// OnBuild is a trigger for images built from this one.
	OnBuild struct{ Expr string }
)

// CommandLine is a command in shell form (one element, to be given to the shell) or exec form.
type CommandLine struct {
	Args []string
	// Shell is true for the shell form.
	Shell bool
}

// Heredoc is a document in a COPY, ADD or RUN.
type Heredoc struct {
	Name, Data string
	// Expand says that variables in Data count.
	Expand bool
}

// Copy is COPY and ADD.
type Copy struct {
	// Add is true for ADD.
	Add bool
	// From is a stage's name or number, or an image; "" for the context.
	From string
	// Sources are paths, patterns and, with ADD, URLs.
	Sources []string
	// Files are heredocs, copied as files of their names.
	Files []Heredoc
	// Dest is the destination as written.
	Dest string
	// Chown, Chmod, Checksum, Exclude are the flags' values.
	Chown, Chmod, Checksum string
	Exclude                []string
	// Link, Parents are the flags.
	Link, Parents bool
	// Follow follows links that are named, though Parents is set: what a mount wants. No flag sets it.
	Follow bool
	// Unpack overrides whether archives are unpacked; nil is the instruction's default.
	Unpack *bool
	// KeepGit is --keep-git-dir's value; nil without it.
	KeepGit *bool
}

// Run is RUN.
type Run struct {
	CommandLine
	// Script, when set, is the content of a file that is to be executed itself: a heredoc that begins with "#!".
	Script string
	// ScriptName is the heredoc's name.
	ScriptName string
	// Mounts are --mount, filled by Expand only.
	Mounts []Mount
	// Network is default, none or host; Security is sandbox or insecure.
	Network, Security string
	// Devices are --device.
	Devices []Device
	// From are the stages and images that mounts name, which need no variables.
	From []string

	raw *instructions.RunCommand
}

// Device is one --device of a RUN: the name of a CDI device.
type Device struct {
	Name     string
	Required bool
}

// Mount is one --mount of a RUN.
type Mount struct {
	Type           string // bind, cache, tmpfs, secret, ssh
	From           string
	Source, Target string
	ReadOnly       bool
	Size           int64 // tmpfs, bytes; 0 without limit
	ID             string
	Sharing        string // cache: shared, private, locked; "" is shared
	Required       bool
	Env            *string // secret: the variable to put it into
	Mode           *uint64
	UID, GID       *uint64
}

// convert makes our own instruction of BuildKit's.
func convert(in any) (Instruction, error) {
	switch c := in.(type) {
	case *instructions.EnvCommand:
		return &EnvVars{pairs(c.Env)}, nil
	case *instructions.LabelCommand:
		return &Label{pairs(c.Labels)}, nil
	case *instructions.ArgCommand:
		a := &Arg{}
		for _, kv := range c.Args {
			a.Args = append(a.Args, ArgVar{kv.Key, kv.Value, kv.DocComment})
		}
		return a, nil
	case *instructions.MaintainerCommand:
		return &Maintainer{c.Maintainer}, nil
	case *instructions.WorkdirCommand:
		return &Workdir{c.Path}, nil
	case *instructions.UserCommand:
		return &User{c.User}, nil
	case *instructions.ExposeCommand:
		return &Expose{Ports: c.Ports}, nil
	case *instructions.VolumeCommand:
		return &Volume{c.Volumes}, nil
	case *instructions.StopSignalCommand:
		return &StopSignal{c.Signal}, nil
	case *instructions.ShellCommand:
		return &Shell{c.Shell}, nil
	case *instructions.CmdCommand:
		return &Cmd{CommandLine{c.CmdLine, c.PrependShell}}, nil
	case *instructions.EntrypointCommand:
		return &Entrypoint{CommandLine{c.CmdLine, c.PrependShell}}, nil
	case *instructions.HealthCheckCommand:
		return &Healthcheck{*c.Health}, nil
	case *instructions.OnbuildCommand:
		return &OnBuild{c.Expression}, nil
	case *instructions.CopyCommand:
		return &Copy{
			From: c.From, Sources: c.SourcePaths, Files: heredocs(c.SourceContents), Dest: c.DestPath, Chown: c.Chown, Chmod: c.Chmod,
			Exclude: c.ExcludePatterns, Link: c.Link, Parents: c.Parents,
		}, nil
	case *instructions.AddCommand:
		return &Copy{
			Add: true, Sources: c.SourcePaths, Files: heredocs(c.SourceContents), Dest: c.DestPath, Chown: c.Chown, Chmod: c.Chmod,
			Exclude: c.ExcludePatterns, Link: c.Link, Checksum: c.Checksum, Unpack: c.Unpack, KeepGit: c.KeepGitDir,
		}, nil
	case *instructions.RunCommand:
		return convertRun(c)
	}
	return nil, fmt.Errorf("instruction %T is not known", in)
}

// variables counts the variables and labels that an instruction sets.
func variables(in Instruction) int {
	switch i := in.(type) {
	case *EnvVars:
		return len(i.Vars)
	case *Label:
		return len(i.Labels)
	case *Arg:
		return len(i.Args)
	}
	return 0
}

func pairs(kvs instructions.KeyValuePairs) []Pair {
	out := make([]Pair, len(kvs))
	for i, kv := range kvs {
		out[i] = Pair{kv.Key, kv.Value, kv.NoDelim}
	}
	return out
}

func heredocs(cs []instructions.SourceContent) []Heredoc {
	var out []Heredoc
	for _, c := range cs {
		out = append(out, Heredoc{c.Path, c.Data, c.Expand})
	}
	return out
}

// convertRun also turns heredocs into what is executed: a lone one is the script itself, in an interpreter of its own when it has a
// "#!" line; several are given back to the shell, which knows heredocs too.
func convertRun(c *instructions.RunCommand) (*Run, error) {
	r := &Run{
		CommandLine: CommandLine{c.CmdLine, c.PrependShell}, Network: instructions.GetNetwork(c), Security: instructions.GetSecurity(c),
		raw: c,
	}
	for _, d := range instructions.GetDevices(c) {
		r.Devices = append(r.Devices, Device{d.Name, d.Required})
	}
	for _, m := range instructions.GetMounts(c) {
		if m.From != "" {
			r.From = append(r.From, m.From)
		}
	}
	if len(c.Files) == 0 {
		if len(c.CmdLine) == 0 && !c.PrependShell {
			return nil, errors.New("arguments are required")
		}
		return r, nil
	}
	if len(c.CmdLine) != 1 || !c.PrependShell {
		return nil, errors.New("RUN takes heredocs in its shell form only")
	}
	if parser.MustParseHeredoc(c.CmdLine[0]) == nil {
		var b strings.Builder
		b.WriteString(c.CmdLine[0])
		for _, file := range c.Files {
			b.WriteString("\n" + file.Data + file.Name)
		}
		r.Args = []string{b.String()}
		return r, nil
	}
	data := c.Files[0].Data
	if c.Files[0].Chomp {
		data = parser.ChompHeredocContent(data)
	}
	if strings.HasPrefix(data, "#!") {
		r.Script, r.ScriptName = data, c.Files[0].Name
		r.CommandLine = CommandLine{}
		return r, nil
	}
	r.Args = []string{data}
	return r, nil
}

func (r *Run) expand(f *File, env Env) (Instruction, error) {
	if err := r.raw.Expand(func(w string) (string, error) { return f.Word(w, env) }); err != nil {
		return nil, errors.New(err.Error())
	}
	out := *r
	out.Mounts = nil
	for _, m := range instructions.GetMounts(r.raw) {
		o := Mount{
			Type: string(m.Type), From: m.From, Source: m.Source, Target: m.Target, ReadOnly: m.ReadOnly, Size: m.SizeLimit,
			ID: m.CacheID, Sharing: string(m.CacheSharing), Required: m.Required, Mode: m.Mode, UID: m.UID, GID: m.GID,
			Env: m.Env,
		}
		out.Mounts = append(out.Mounts, o)
	}
	return &out, nil
}

func (c *Copy) expand(f *File, env Env) (Instruction, error) {
	out := *c
	var err error
	if out.Sources, err = f.each(c.Sources, env); err != nil {
		return nil, err
	}
	for _, s := range []*string{&out.Dest, &out.Chown, &out.Chmod, &out.Checksum} {
		if *s, err = f.Word(*s, env); err != nil {
			return nil, err
		}
	}
	out.Files = slices.Clone(c.Files)
	for i, h := range out.Files {
		if !h.Expand {
			continue
		}
		if out.Files[i].Data, err = f.Text(h.Data, env); err != nil {
			return nil, err
		}
	}
	return &out, nil
}

func (f *File) each(in []string, env Env) ([]string, error) {
	out := make([]string, len(in))
	for i, s := range in {
		w, err := f.Word(s, env)
		if err != nil {
			return nil, err
		}
		out[i] = w
	}
	return out, nil
}

func (f *File) eachPair(in []Pair, env Env) ([]Pair, error) {
	out := make([]Pair, len(in))
	for i, p := range in {
		k, err := f.Word(p.Key, env)
		if err != nil {
			return nil, err
		}
		v, err := f.Word(p.Value, env)
		if err != nil {
			return nil, err
		}
		out[i] = Pair{k, v, p.Blank}
	}
	return out, nil
}

func (e *EnvVars) expand(f *File, env Env) (Instruction, error) {
	vars, err := f.eachPair(e.Vars, env)
	return &EnvVars{vars}, err
}

func (l *Label) expand(f *File, env Env) (Instruction, error) {
	labels, err := f.eachPair(l.Labels, env)
	return &Label{labels}, err
}

func (w *Workdir) expand(f *File, env Env) (Instruction, error) {
	p, err := f.Word(w.Path, env)
	return &Workdir{p}, err
}

func (u *User) expand(f *File, env Env) (Instruction, error) {
	s, err := f.Word(u.User, env)
	return &User{s}, err
}

func (e *Expose) expand(f *File, env Env) (Instruction, error) {
	out := &Expose{}
	for _, p := range e.Ports {
		ws, err := f.words(p, env)
		if err != nil {
			return nil, err
		}
		for _, w := range ws {
			p, err := parsePort(w)
			if err != nil {
				return nil, err
			}
			if len(out.Ports)+p.last-p.first > maxPorts {
				return nil, fmt.Errorf("EXPOSE of more than %d ports", maxPorts)
			}
			out.Words = append(out.Words, w)
			for n := p.first; n <= p.last; n++ {
				out.Ports = append(out.Ports, strconv.Itoa(n)+"/"+p.proto)
			}
		}
	}
	return out, nil
}

func (v *Volume) expand(f *File, env Env) (Instruction, error) {
	ps, err := f.each(v.Paths, env)
	return &Volume{ps}, err
}

func (s *StopSignal) expand(f *File, env Env) (Instruction, error) {
	w, err := f.Word(s.Signal, env)
	return &StopSignal{w}, err
}

// expand of an Arg leaves the values: whether the default counts depends on what the caller was given.
func (a *Arg) expand(*File, Env) (Instruction, error) { return a, nil }

func (m *Maintainer) expand(*File, Env) (Instruction, error)  { return m, nil }
func (s *Shell) expand(*File, Env) (Instruction, error)       { return s, nil }
func (c *Cmd) expand(*File, Env) (Instruction, error)         { return c, nil }
func (e *Entrypoint) expand(*File, Env) (Instruction, error)  { return e, nil }
func (h *Healthcheck) expand(*File, Env) (Instruction, error) { return h, nil }
func (o *OnBuild) expand(*File, Env) (Instruction, error)     { return o, nil }

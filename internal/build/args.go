package build

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"conex/internal/dockerfile"
)

// proxyArgs are build arguments that reach RUN without being declared, and then neither keys nor history.
var proxyArgs = []string{"http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "all_proxy"}

func isProxy(name string) bool { return slices.Contains(proxyArgs, strings.ToLower(name)) }

// globals evaluates the ARGs before the first FROM, after those that are there by themselves.
func (p *planner) globals() error {
	target := p.req.Target
	if target == "" {
		target = p.file.Stages[len(p.file.Stages)-1].Name
	}
	if target == "" {
		target = "default"
	}
	for _, kv := range [][2]string{
		{"BUILDPLATFORM", platformString(p.local)}, {"BUILDOS", p.local.OS}, {"BUILDOSVERSION", ""}, {"BUILDARCH", p.local.Architecture},
		{"BUILDVARIANT", p.local.Variant}, {"TARGETPLATFORM", platformString(p.platform)}, {"TARGETOS", p.platform.OS}, {"TARGETOSVERSION", ""},
		{"TARGETARCH", p.platform.Architecture}, {"TARGETVARIANT", p.platform.Variant}, {"TARGETSTAGE", target},
	} {
		v := kv[1]
		if given, ok := p.req.BuildArgs[kv[0]]; ok && given != nil {
			v = *given
		}
		p.global = append(p.global, kv[0]+"="+v)
	}
	if v := given(p.req.BuildArgs["BUILDKIT_MULTI_PLATFORM"]); v != "" {
		if _, err := strconv.ParseBool(v); err != nil { // what it is for is no matter here: a build has one platform
			return fmt.Errorf("invalid boolean value for multi-platform: %s", v)
		}
	}
	p.defaults = slices.Clone(p.global)
	size := 0
	for _, s := range p.file.Args {
		for _, a := range s.Instruction.(*dockerfile.Arg).Args {
			p.declared = append(p.declared, a.Key)
			if a.Value != nil {
				if v, err := p.file.Word(*a.Value, p.defaults); err == nil {
					p.defaults = append(p.defaults, a.Key+"="+v)
				}
			}
			g := globalArg{ArgVar: a, lines: s.Lines}
			if given, ok := p.req.BuildArgs[a.Key]; ok && given != nil {
				g.Value = given
			} else if a.Value != nil {
				used := &usedVars{Env: p.global}
				v, err := p.file.Word(*a.Value, used)
				if err != nil {
					return p.file.Errorf(s.Lines, "%w", err)
				}
				g.Value, g.uses = &v, used.names
			}
			if g.Value != nil {
				p.global = append(p.global, a.Key+"="+*g.Value)
				if size += len(*g.Value); size > maxConfig {
					return p.file.Errorf(s.Lines, "%w", errConfigSize)
				}
			}
			p.globalArgs = append(p.globalArgs, g)
		}
	}
	for _, k := range slices.Sorted(maps.Keys(p.req.BuildArgs)) {
		// Programs differ in which case they read, so both are set; a case that was given itself goes before.
		if v := p.req.BuildArgs[k]; isProxy(k) && v != nil {
			p.proxies = append(p.proxies, k+"="+*v)
			for _, other := range []string{strings.ToLower(k), strings.ToUpper(k)} {
				if given := p.req.BuildArgs[other]; given == nil {
					p.proxies = append(p.proxies, other+"="+*v)
				}
			}
		}
	}
	return nil
}

// epoch is SOURCE_DATE_EPOCH, the time to give to everything; nil without one.
func (p *planner) epoch() (*time.Time, error) {
	v, _ := p.global.Get("SOURCE_DATE_EPOCH") // an ARG before the first FROM may have a default
	if given := p.req.BuildArgs["SOURCE_DATE_EPOCH"]; given != nil {
		v = *given
	}
	if v == "" {
		return nil, nil
	}
	n, err := strconv.ParseInt(v, 10, 64)
	if err != nil || n < 0 || n > maxEpoch {
		return nil, fmt.Errorf("invalid SOURCE_DATE_EPOCH: %s: it must be a number of seconds since 1970", v)
	}
	t := time.Unix(n, 0).UTC()
	return &t, nil
}

// maxEpoch is the end of the year 9999: later times have no form in JSON.
const maxEpoch = 253402300799

// declare adds ARGs to a stage: the value given, else the default here, else the global one. As in BuildKit an ARG hides an ENV that
// stands above it, and reaches the stages that are built on this one.
func (s *stage) declare(p *planner, st dockerfile.Step, a *dockerfile.Arg) error {
	msg := "ARG"
	for _, v := range a.Args {
		inherited := false
		given, ok := p.req.BuildArgs[v.Key]
		switch {
		case ok && given != nil:
			v.Value = given
		case v.Value != nil:
			watched := &dockerfile.Watched{Env: s.vars}
			val, err := p.file.Word(*v.Value, watched)
			s.checks.Unset(st, watched.Unset, s.argNames(), s.vars)
			if err != nil {
				return err
			}
			v.Value = &val
		default:
			if val, ok := p.global.Get(v.Key); ok {
				v.Value, inherited = &val, true
			}
		}
		s.defined.arg(v, st.Lines, inherited)
		msg += " " + v.Key
		if v.Value != nil && !strings.HasPrefix(v.Key, "BUILDKIT_SBOM_SCAN_") {
			s.vars = append(s.vars, v.Key+"="+*v.Value)
		}
		if v.Value != nil {
			msg += "=" + *v.Value
		}
		if i := slices.IndexFunc(s.args, func(a dockerfile.ArgVar) bool { return a.Key == v.Key }); i < 0 {
			s.args = append(s.args, v)
		} else if v.Value != nil {
			s.args[i] = v
		}
	}
	s.cfg.note(msg)
	if s.cfg.size > maxConfig {
		return errConfigSize
	}
	return nil
}

// unconsumed names the build arguments that no ARG declares: most often a misspelling.
func (p *planner) unconsumed() []string {
	known := map[string]bool{"SOURCE_DATE_EPOCH": true}
	for _, k := range p.global.Keys() {
		known[k] = true
	}
	steps := p.file.Args
	for _, s := range p.file.Stages {
		steps = append(slices.Clip(steps), s.Steps...)
	}
	for _, st := range steps {
		if a, ok := st.Instruction.(*dockerfile.Arg); ok {
			for _, v := range a.Args {
				known[v.Key] = true
			}
		}
	}
	for _, s := range p.stages { // ONBUILD brings ARGs too
		for _, a := range s.args {
			known[a.Key] = true
		}
	}
	var out []string
	for _, k := range slices.Sorted(maps.Keys(p.req.BuildArgs)) {
		if !known[k] && !isProxy(k) && !strings.HasPrefix(k, "BUILDKIT_") {
			out = append(out, k)
		}
	}
	return out
}

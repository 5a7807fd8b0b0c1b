package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/pflag"

	"conex/internal/build"
	"conex/internal/engine"
)

// outputFlags are build's flags that say what comes out of it.
type outputFlags struct {
	outputs, annotations list
	cacheFrom, cacheTo   list
	metadata, iidfile    string
	squash               squashFlag
	quiet                bool
}

func (o *outputFlags) add(f *pflag.FlagSet, req *engine.BuildRequest) {
	f.Var(&o.annotations, "annotation", "Add annotation to the image")
	f.Var(&o.cacheFrom, "cache-from", `External cache sources (e.g., "user/app:cache", "type=local,src=path/to/dir")`)
	f.Var(&o.cacheTo, "cache-to", `Cache export destinations (e.g., "type=registry,ref=user/app:cache,mode=max", "type=local,dest=path/to/dir", "type=inline")`)
	f.StringVar(&o.iidfile, "iidfile", "", "Write the image ID to a file")
	f.BoolVar(&req.Load, "load", false, `Put the image into the image store too (which is what happens without "--output")`)
	f.StringVar(&o.metadata, "metadata-file", "", "Write build result metadata to a file")
	f.VarP(&o.outputs, "output", "o", `Output destination (format: "type=local,dest=path")`)
	f.BoolVar(&req.Push, "push", false, `Push the image to the registries of its tags (shorthand for "--output=type=registry")`)
	f.BoolVarP(&o.quiet, "quiet", "q", false, "Suppress the build output and print image ID on success")
	f.Var(&o.squash, "squash", `Make one layer of what the build adds ("new", the default) or of everything ("all")`)
	f.Lookup("squash").NoOptDefVal = build.SquashNew
	f.BoolVar(&req.Verify, "verify", false, "Build a second time without cache and show the first file that differs")
	// What people say to be rid of attestations.
	for _, name := range []string{"attest", "provenance", "sbom"} {
		fl := f.VarPF(&attestFlag{name}, name, "", "")
		fl.Hidden = true
		if name != "attest" {
			fl.NoOptDefVal = "true"
		}
	}
}

// squashFlag is --squash, --squash=new or --squash=all.
type squashFlag string

func (s *squashFlag) Set(v string) error {
	switch v {
	case build.SquashAll, build.SquashNew:
		*s = squashFlag(v)
	case "true", "1":
		*s = build.SquashNew
	case "false", "0":
		*s = ""
	default:
		return fmt.Errorf("it is %q or %q", build.SquashNew, build.SquashAll)
	}
	return nil
}
func (s *squashFlag) Type() string   { return "string" }
func (s *squashFlag) String() string { return string(*s) }

// attestFlag takes --provenance, --sbom and --attest where they ask for nothing.
type attestFlag struct{ name string }

func (a *attestFlag) Set(v string) error {
	if on, err := strconv.ParseBool(v); err == nil && !on {
		return nil
	}
	for _, f := range strings.Split(v, ",") {
		if off, err := strconv.ParseBool(strings.TrimPrefix(f, "disabled=")); err == nil && off && strings.HasPrefix(f, "disabled=") {
			return nil
		}
	}
	off := "--" + a.name + "=false"
	if a.name == "attest" {
		off = "--attest type=TYPE,disabled=true"
	}
	return &refusal{a.name, "is refused: conex makes no attestations (" + off + " is taken)"}
}
func (a *attestFlag) Type() string   { return "string" }
func (a *attestFlag) String() string { return "" }

// request fills in what the flags ask for.
func (o *outputFlags) request(a *app, req *engine.BuildRequest) error {
	for _, s := range o.outputs {
		if s == "" {
			continue
		}
		out, err := engine.ParseBuildOutput(s)
		if err != nil {
			return err
		}
		if _, tty := terminal(a.out); tty && out.Dest == "-" {
			return fmt.Errorf("dest file is required for %s exporter. refusing to write to console", out.Type)
		}
		req.Outputs = append(req.Outputs, out)
	}
	for _, s := range o.cacheFrom {
		c, err := engine.ParseCacheFrom(s)
		if err != nil {
			return err
		}
		req.From = append(req.From, c)
	}
	for _, s := range o.cacheTo {
		c, err := engine.ParseCacheTo(s)
		if err != nil {
			return err
		}
		req.To = append(req.To, c)
	}
	req.Annotations, req.Squash = o.annotations, string(o.squash)
	req.File = func(dest string, write func(io.Writer) error) error {
		if dest == "-" {
			return write(a.out)
		}
		return a.outputAs(dest, 0o666, write)
	}
	if v := os.Getenv("SOURCE_DATE_EPOCH"); v != "" {
		if _, ok := req.BuildArgs["SOURCE_DATE_EPOCH"]; !ok {
			req.BuildArgs["SOURCE_DATE_EPOCH"] = &v
		}
	}
	return nil
}

// begin removes what an earlier build has written: it must not be taken for the result of one that fails.
func (o *outputFlags) begin() error {
	for _, f := range []string{o.iidfile, o.metadata} {
		if f == "" {
			continue
		}
		if err := os.Remove(f); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("remove the file of an earlier build: %w", err)
		}
	}
	return nil
}

// end writes and prints what a build has to say of its result.
func (o *outputFlags) end(a *app, req *engine.BuildRequest, res engine.BuildResult) error {
	if o.iidfile != "" {
		if err := os.WriteFile(o.iidfile, []byte(res.ID), 0o666); err != nil {
			return fmt.Errorf("write image ID file: %w", err)
		}
	}
	if o.metadata != "" {
		m := map[string]any{"buildx.build.ref": "default/default/" + res.Ref}
		for k, v := range res.Metadata {
			m[k] = v
		}
		raw, err := json.MarshalIndent(m, "", "  ")
		if err != nil {
			return err
		}
		if err := a.outputAs(o.metadata, 0o666, func(w io.Writer) error { _, err := w.Write(raw); return err }); err != nil {
			return fmt.Errorf("write metadata file: %w", err)
		}
	}
	toStdout := slices.ContainsFunc(req.Outputs, func(out engine.BuildOutput) bool { return out.Dest == "-" })
	if _, image := res.Metadata["containerimage.config.digest"]; o.quiet && image && !toStdout {
		fmt.Fprintln(a.out, res.ID)
	}
	return nil
}

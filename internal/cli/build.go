package cli

import (
	"cmp"
	"errors"
	"os"
	"runtime"
	"strings"

	"github.com/spf13/cobra"

	"conex/internal/engine"
)

func (a *app) buildCommand() *cobra.Command {
	var req engine.BuildRequest
	var tags, args, labels list
	var output outputFlags
	var runs buildRunFlags
	var progress, trace string
	var call callFlag
	var check, debug, explain bool
	var shell string
	cmd := &cobra.Command{
		Use: "build [OPTIONS] PATH | URL | -", Short: "Build an image from a Dockerfile", Args: a.exactly(1),
		RunE: func(cmd *cobra.Command, argv []string) error {
			req.Context, req.Tags, req.Labels = argv[0], tags, keyValues(labels)
			req.BuildArgs = buildArgs(args)
			if err := runs.apply(&req.Request); err != nil {
				return a.usageError(cmd, err)
			}
			if req.Context == "-" || req.Dockerfile == "-" {
				if req.Context == req.Dockerfile {
					return a.usageError(cmd, errors.New("invalid argument: can't use stdin for both build context and dockerfile"))
				}
				req.Stdin = a.in
			}
			if err := output.request(a, &req); err != nil {
				return a.usageError(cmd, err)
			}
			view, err := a.buildView(progress, output.quiet, explain)
			if err != nil {
				return a.usageError(cmd, err)
			}
			defer view.close()
			if debug {
				if err := a.debugBuild(&req, view, shell); err != nil {
					return a.usageError(cmd, err)
				}
			}
			if err := output.begin(); err != nil {
				return err
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			ctx, stop := a.interruptible(cmd.Context())
			defer stop()
			if check {
				call.name = "check"
			}
			if call.name != "" {
				req.Display = view.event
				return a.buildCall(ctx, e, &call, req)
			}
			var found findings
			req.Display = found.through(view.show)
			res, err := e.Build(ctx, req)
			view.close()
			if view.talks() {
				found.tell(a, a.debug)
			}
			if trace != "" {
				err = errors.Join(err, a.writeTrace(e, res.Ref, trace))
			}
			if err != nil {
				return err
			}
			view.result(res, req.Tags)
			output.quiet = view.mode == "quiet"
			return output.end(a, &req, res)
		},
	}
	// A context of such a name is ./history.
	cmd.AddCommand(a.buildDiffCommand(), a.buildHistoryCommand(), a.buildShellCommand(), a.buildWhichCommand())
	cmd.Annotations = map[string]string{"runs": "1"}
	f := cmd.Flags()
	output.add(f, &req)
	runs.register(f)
	f.Var(&args, "build-arg", "Set build-time variables")
	f.Var(contextsFlag{&req.Contexts}, "build-context", `Additional build contexts (e.g., name=path, name=docker-image://ref, name=target:stage)`)
	f.Var(&call, "call", `Set what to do with the Dockerfile ("build", "check", "outline", "targets"; with ",format=json" as JSON)`)
	f.BoolVar(&check, "check", false, `Shorthand for "--call=check": check the Dockerfile, build nothing`)
	f.BoolVarP(&debug, "debug", "D", false, "Open a shell in the file system of a RUN step that fails, then ask: retry, continue or stop")
	f.StringVar(&shell, "shell", "", "The shell of --debug (default: the stage's, bash or sh)")
	f.BoolVar(&explain, "explain", false, "Say why each step was not cached, and where the result of each other one came from")
	f.StringVar(&trace, "trace", "", "Write what took how long as a Chrome trace to a file")
	f.StringVarP(&req.Dockerfile, "file", "f", "", `Name of the Dockerfile (default "PATH/Dockerfile")`)
	f.Var(&labels, "label", "Set metadata for an image")
	f.BoolVar(&req.NoCache, "no-cache", false, "Do not use cache when building the image")
	f.StringSliceVar(&req.NoCacheFilter, "no-cache-filter", nil, "Do not cache specified stages")
	f.StringVar(&req.Platform, "platform", os.Getenv("DOCKER_DEFAULT_PLATFORM"), "Set the platform (this machine's: "+runtime.GOOS+"/"+runtime.GOARCH+")")
	f.StringVar(&progress, "progress", cmp.Or(os.Getenv("BUILDKIT_PROGRESS"), "auto"), `Type of progress output ("auto", "plain", "tty", "json", "quiet")`)
	f.BoolVar(&req.Pull, "pull", false, "Always attempt to pull a newer version of the image")
	f.VarP(&tags, "tag", "t", `Name and optionally a tag in the "name:tag" format`)
	f.StringVar(&req.Target, "target", "", "Set the target build stage to build")
	// What these ask for is what happens anyway: no intermediate containers are left.
	for _, name := range []string{"rm", "force-rm"} {
		f.Var(&fixedFlag{name}, name, "")
		f.Lookup(name).NoOptDefVal, f.Lookup(name).Hidden = "true", true
	}
	refuseAll(f,
		"builder",
		"compress?",
		"disable-content-trust?",
		"isolation",
		"policy",
		"security-opt",
	)
	return cmd
}

// fixedFlag is a switch of Docker's that is always on here: true is taken, false refused.
type fixedFlag struct{ name string }

func (f *fixedFlag) Set(s string) error {
	if s == "true" || s == "1" {
		return nil
	}
	return &refusal{f.name, "is always on"}
}
func (f *fixedFlag) Type() string   { return "bool" }
func (f *fixedFlag) String() string { return "" }

// buildArgs reads --build-arg KEY=value; a KEY alone takes the caller's value, nil if there is none.
func buildArgs(words []string) map[string]*string {
	m := map[string]*string{}
	for _, w := range words {
		k, v, ok := strings.Cut(w, "=")
		if !ok {
			v, ok = os.LookupEnv(k)
		}
		if ok {
			m[k] = &v
		} else {
			m[k] = nil
		}
	}
	return m
}

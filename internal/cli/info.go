package cli

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"conex/internal/engine"
)

// infoView is what templates of info may name: the engine's fields, and Docker's about the client.
type infoView struct {
	engine.Info
	ServerVersion string
	Debug         bool
	ClientInfo    struct {
		Debug   bool
		Version string
		Context string
	}
}

func (a *app) infoCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use: "info [OPTIONS]", Short: "Display system-wide information", Args: a.exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			i, err := e.Info(cmd.Context())
			if err != nil {
				return err
			}
			if format != "" {
				v := infoView{Info: i, ServerVersion: Version, Debug: a.debug}
				v.ClientInfo.Debug, v.ClientInfo.Version, v.ClientInfo.Context = a.debug, Version, "default"
				return writeOne(a.out, format, v)
			}
			printInfo(a.out, i, a.debug)
			for _, w := range i.Warnings {
				fmt.Fprintln(a.err, w)
			}
			return nil
		},
	}
	cmd.Flags().StringVarP(&format, "format", "f", "", inspectHelp)
	return cmd
}

// printInfo lays the fields out as Docker does, and adds why the storage driver was chosen and how logs are bounded.
func printInfo(out io.Writer, i engine.Info, debug bool) {
	p := func(format string, args ...any) { fmt.Fprintf(out, format+"\n", args...) }
	p("Client:")
	p(" Version:    %s", Version)
	p(" Context:    default")
	p(" Debug Mode: %t", debug)
	p("\nServer:")
	p(" Containers: %d", i.Containers)
	p("  Running: %d", i.ContainersRunning)
	p("  Paused: %d", i.ContainersPaused)
	p("  Stopped: %d", i.ContainersStopped)
	p(" Images: %d", i.Images)
	p(" Server Version: %s (no daemon: the engine is in this program)", Version)
	p(" Storage Driver: %s", i.Driver)
	for _, kv := range i.DriverStatus {
		p("  %s: %s", kv[0], kv[1])
	}
	p(" Logging Driver: %s", i.LoggingDriver)
	if i.LogLimits != "" {
		p("  Limits: %s", i.LogLimits)
	}
	p(" Cgroup Driver: %s", i.CgroupDriver)
	p(" Cgroup Version: %s", i.CgroupVersion)
	p("  Controllers: %s", strings.Join(i.CgroupControllers, " "))
	p(" Runtimes: %s", strings.Join(slices.Sorted(maps.Keys(i.Runtimes)), " "))
	p(" Default Runtime: %s", i.DefaultRuntime)
	p(" Security Options:")
	for _, o := range i.SecurityOptions {
		fields := strings.Split(o, ",")
		p("  %s", strings.TrimPrefix(fields[0], "name="))
		for _, f := range fields[1:] {
			k, v, _ := strings.Cut(f, "=")
			p("   %s: %s", strings.ToUpper(k[:1])+k[1:], v)
		}
	}
	p(" Kernel Version: %s", i.KernelVersion)
	p(" Operating System: %s", i.OperatingSystem)
	p(" OSType: %s", i.OSType)
	p(" Architecture: %s", i.Architecture)
	p(" CPUs: %d", i.NCPU)
	p(" Total Memory: %s", units.BytesSize(float64(i.MemTotal)))
	p(" Name: %s", i.Name)
	p(" Root Dir: %s", i.DockerRootDir)
	p(" State Dir: %s", i.State)
}

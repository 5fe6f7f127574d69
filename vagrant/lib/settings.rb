# SPDX-License-Identifier: Apache-2.0
require "etc"

module Cwndtrace
  # An error that the user can fix; Vagrant prints it and ends with exit code 1.
  class Problem < Vagrant::Errors::VagrantError
    def initialize(cause, cure)
      @text = "#{cause}\n  #{cure}"
      super()
    end

    def error_message
      @text
    end
  end

  # The values of the VAGRANT_* variables, with defaults. Raises Problem for an invalid value.
  class Settings
    DRIVERS = %w[kvm qemu].freeze
    ARCHES = %w[x86_64 arm64].freeze
    # In MiB. Tracing and the lab need less than one GiB.
    LEAST_MEMORY = 1024

    attr_reader :arch, :driver, :cpus, :memory, :jupyter_port, :kernel

    def initialize(env)
      @driver = env.fetch("VAGRANT_DRIVER", "kvm")
      raise Problem.new("VAGRANT_DRIVER=#{@driver} is no driver.", "Use one of: #{DRIVERS.join(", ")}") unless DRIVERS.include?(@driver)

      @arch = env.fetch("VAGRANT_ARCH", RbConfig::CONFIG["host_cpu"].match?(/aarch64|arm64/) ? "arm64" : "x86_64")
      raise Problem.new("VAGRANT_ARCH=#{@arch} is no architecture.", "Use one of: #{ARCHES.join(", ")}") unless ARCHES.include?(@arch)

      # In software emulation with a second CPU, a kernel that patches its own code crashes sooner or later.
      @cpus = number(env, "VAGRANT_CPUS", @driver == "qemu" ? 1 : [Etc.nprocessors, 4].min, 1)
      @memory = number(env, "VAGRANT_MEMORY", 4096, LEAST_MEMORY)
      @jupyter_port = number(env, "VAGRANT_JUPYTER_PORT", 8888, 1024)
      @kernel = env.fetch("VAGRANT_KERNEL", "6.12")
      @box = env["VAGRANT_BOX"].to_s
    end

    # Raise Problem before "vagrant up" starts a VM that can't run here.
    def check(arguments)
      return unless arguments.include?("up")

      unless Vagrant.has_plugin?("vagrant-libvirt") || which("VBoxManage") || which("VBoxManage.exe")
        raise Problem.new("there is no provider here: neither libvirt nor VirtualBox.",
                          "Debian, Ubuntu: apt install vagrant-libvirt libvirt-daemon-system; elsewhere VirtualBox. See docs/vm.md")
      end
      check_memory
      check_box
    end

    # Set the box: that of VAGRANT_BOX, or else the public one of this version.
    def choose_box(vm, name, version)
      if @box.empty?
        vm.box = name
        vm.box_version = version
      elsif File.file?(@box)
        # The name contains the file's time, so that Vagrant doesn't use an older box of that file.
        vm.box = "local/#{File.basename(@box, ".box")}-#{File.mtime(@box).to_i}"
        vm.box_url = "file://#{File.expand_path(@box)}"
      else
        vm.box = @box
      end
    end

    private

    def number(env, name, default, least)
      text = env.fetch(name, default.to_s)
      return text.to_i if text.match?(/\A\d+\z/) && text.to_i >= least

      unit = name == "VAGRANT_MEMORY" ? " MiB" : ""
      raise Problem.new("#{name}=#{text} is no number from #{least}#{unit} on.", "Correct it, or leave it out for #{default}#{unit}")
    end

    def which(program)
      ENV.fetch("PATH", "").split(File::PATH_SEPARATOR).any? { |folder| File.executable?(File.join(folder, program)) }
    end

    def check_memory
      return unless File.readable?("/proc/meminfo")

      free = File.read("/proc/meminfo")[/^MemAvailable:\s+(\d+)/, 1].to_i / 1024
      return if free >= @memory

      raise Problem.new("the VM needs #{@memory} MiB of memory, and only #{free} MiB are free.",
                        "Close other programs, or set VAGRANT_MEMORY (3072 to build a kernel, #{LEAST_MEMORY} to run one from debs/)")
    end

    def check_box
      if @arch == "arm64" && @box.empty?
        raise Problem.new("no public box for arm64 is named here, because none could be tried.",
                          "Name one, or a .box file: VAGRANT_BOX=... vagrant up (docs/vm.md)")
      end
      return unless @box.end_with?(".box") && !File.file?(@box)

      raise Problem.new("VAGRANT_BOX=#{@box} doesn't exist.", "Build it: sudo vagrant/box/build --output #{@box}")
    end
  end
end

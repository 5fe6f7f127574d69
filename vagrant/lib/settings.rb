# SPDX-License-Identifier: Apache-2.0
require "etc"

module Cwndtrace
  # Something that the user can mend; Vagrant prints it and ends with exit code 1.
  class Problem < Vagrant::Errors::VagrantError
    def initialize(cause, cure)
      @text = "#{cause}\n  #{cure}"
      super()
    end

    def error_message
      @text
    end
  end

  # What the VAGRANT_* variables say, with defaults; a value that can't be is a Problem.
  class Settings
    DRIVERS = %w[kvm qemu].freeze
    # In MiB. A capture and the lab take less than one GiB.
    LEAST_MEMORY = 1024

    attr_reader :driver, :cpus, :memory, :jupyter_port, :kernel

    def initialize(env)
      @driver = env.fetch("VAGRANT_DRIVER", "kvm")
      raise Problem.new("VAGRANT_DRIVER=#{@driver} is none.", "It is one of: #{DRIVERS.join(", ")}") unless DRIVERS.include?(@driver)

      # Under software emulation a kernel that patches its own code dies sooner or later when there is a second CPU.
      @cpus = number(env, "VAGRANT_CPUS", @driver == "qemu" ? 1 : [Etc.nprocessors, 4].min, 1)
      @memory = number(env, "VAGRANT_MEMORY", 4096, LEAST_MEMORY)
      @jupyter_port = number(env, "VAGRANT_JUPYTER_PORT", 8888, 1024)
      @kernel = env.fetch("VAGRANT_KERNEL", "6.12")
      @box = env["VAGRANT_BOX"].to_s
    end

    # Stop a VM from being started that can't run here.
    def check(arguments)
      return unless arguments.include?("up")

      unless Vagrant.has_plugin?("vagrant-libvirt") || which("VBoxManage") || which("VBoxManage.exe")
        raise Problem.new("no provider is here: neither libvirt nor VirtualBox.",
                          "Debian, Ubuntu: apt install vagrant-libvirt libvirt-daemon-system; elsewhere VirtualBox. See docs/vm.md")
      end
      check_memory
      check_box
    end

    # Set the box: the user's own, or else the public one of this version.
    def choose_box(vm, name, version)
      if @box.empty?
        vm.box = name
        vm.box_version = version
      elsif File.file?(@box)
        # By its time, so that a box that was built anew isn't taken for the one that Vagrant has.
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
      raise Problem.new("#{name}=#{text} is no number from #{least}#{unit} on.", "Set it, or leave it out for #{default}#{unit}")
    end

    def which(program)
      ENV.fetch("PATH", "").split(File::PATH_SEPARATOR).any? { |folder| File.executable?(File.join(folder, program)) }
    end

    def check_memory
      return unless File.readable?("/proc/meminfo")

      free = File.read("/proc/meminfo")[/^MemAvailable:\s+(\d+)/, 1].to_i / 1024
      return if free >= @memory

      raise Problem.new("the VM is to have #{@memory} MiB, and #{free} MiB are free.",
                        "Close something, or set VAGRANT_MEMORY (3072 to build a kernel, #{LEAST_MEMORY} to run one from debs/)")
    end

    def check_box
      return unless @box.end_with?(".box") && !File.file?(@box)

      raise Problem.new("VAGRANT_BOX=#{@box} isn't there.", "Build it: sudo vagrant/box/build --output #{@box}")
    end
  end
end
